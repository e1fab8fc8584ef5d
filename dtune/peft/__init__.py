"""Fine-tuning methods: one file a method."""
