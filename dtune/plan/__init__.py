"""What a run takes and how long: predicted without a device, and solved for settings that fit."""
