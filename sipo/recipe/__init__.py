"""From a configuration to a trained model, and the commands around it."""
