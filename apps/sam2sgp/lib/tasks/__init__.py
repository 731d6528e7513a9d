"""Work that takes minutes or hours, each in a process of its own."""
