"""What an operator does with the server as a whole: start it, back it up, restore it."""
