"""What an agent acts in: a protocol of messages and tools, and the environments that are built in."""
