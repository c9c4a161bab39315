"""A standby that follows another server, the primary, and takes over from it: both sides, free of any transport."""
