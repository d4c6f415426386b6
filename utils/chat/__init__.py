"""The chat page: server, layout, handlers, conversations."""
