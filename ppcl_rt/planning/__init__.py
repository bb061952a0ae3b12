"""Plans and what they are made from: plain data, no torch."""
