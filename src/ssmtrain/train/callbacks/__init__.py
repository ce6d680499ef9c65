"""What happens between steps, one file each: saving, validation, samples, health, metrics, console."""
