"""Spans of sampled requests: noted by the serving thread, made and sent by another one."""
