"""What `tools/doctor.py` looks at: this machine, a layout's arithmetic, a checkpoint, a data set."""
