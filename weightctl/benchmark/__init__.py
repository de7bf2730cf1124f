"""How loads are measured: every run a process of its own, every tensor compared."""
