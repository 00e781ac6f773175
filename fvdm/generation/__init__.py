"""From a trained model, a task and given frames to videos."""
