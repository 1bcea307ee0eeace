"""The tutorial's network."""
