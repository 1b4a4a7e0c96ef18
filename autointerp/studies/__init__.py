"""Studies of the scores themselves: planted truth (`calibrate`) and differences between methods (`compare`)."""
