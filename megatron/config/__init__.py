"""What the user wrote (Config), what must hold for it, and what it comes to (Plan). No torch."""
