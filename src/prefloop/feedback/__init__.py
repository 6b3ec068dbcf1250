"""What people say: which pairs to ask them about, and their votes as comparisons in the store."""
