"""What `austeer inspect` shows: rankings, chance and stability."""
