"""The sharpness-aware family: one member, one file."""
