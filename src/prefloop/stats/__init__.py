"""Statistics over plain numbers and labels; numpy and scipy only."""
