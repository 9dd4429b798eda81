"""`leave_out_compiler`, for those who can only name a module to be imported first: the server that ranks are forked from."""

from megatron_ext.runtime.compiler import leave_out_compiler

leave_out_compiler()
