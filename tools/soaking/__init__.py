"""What ``tools/soak.py`` is made of: runs, interrupts and cases."""
