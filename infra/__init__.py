"""Own pyinfra facts and operations: only where many round trips become one (field notes, speed.md)."""
