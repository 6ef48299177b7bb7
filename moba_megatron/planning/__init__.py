"""Estimates before a run, computed from sizes: operations, bytes, memory and time, and the layouts that fit.

`run_plan` is the plan of one configuration, of `memory` (`memory_layer`, `memory_experts`) and `plan_time`
(`kernel_model`, `plan_traffic`, `expert_traffic`); `plan_layouts` suggests others, `plan_cluster` prints it all for the
command `plan_command`.
"""
