"""One file per concern; each task applies its part of the plan."""
