"""The task metric of the exported model, and how sure it is."""
