"""The commands of tools/few_shot.py, one file each."""
