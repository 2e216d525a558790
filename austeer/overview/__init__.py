"""What `austeer inspect` shows of a momentum or a plan."""
