"""What XLA's compiler for TPUs makes of the steps, on a machine without one."""
