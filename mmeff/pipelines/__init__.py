"""Loading models and pipelines by folder or hub name."""
