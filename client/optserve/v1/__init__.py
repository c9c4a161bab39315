"""Generated from proto/optserve/v1 by proto/generate.py; never edited."""
