"""Models for other programs, one file an engine; nothing else in quantlab imports any of it."""
