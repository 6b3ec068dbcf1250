"""The stages of the loop: durable, idempotent steps over the store, each of which can be run on its own."""
