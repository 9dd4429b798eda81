"""The compiler's stand-in, for those who can only name a module to be imported first: the server that ranks are forked from.

Its ranks see no GPU, and it must not look for one: a process that has looked cannot be forked into one that sees none.
"""

from megatron_ext.runtime.compiler import install_stand_in

install_stand_in()
