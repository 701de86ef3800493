"""CUDA graphs: functions captured once and replayed. Knows no solver; a runner is passed to one."""
