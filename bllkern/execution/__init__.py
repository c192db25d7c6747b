"""When and where a block learns: targets of a step, schedules, sizing."""
