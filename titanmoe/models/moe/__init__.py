"""The mixture-of-experts layer: router, dispatcher, experts."""
