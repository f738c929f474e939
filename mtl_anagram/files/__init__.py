"""Files: the hub and folders, pictures, outputs, prompts kept on disk."""
