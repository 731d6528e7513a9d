"""Images and labels: a folder, an archive or sessions; what is let in, and who decided what about it."""
