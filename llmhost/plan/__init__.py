"""The planner. `llmhost.plan.host.plan(loaded, hardware, host)` decides; everything else applies or checks."""
