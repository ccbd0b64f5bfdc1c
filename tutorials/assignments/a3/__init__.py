"""Assignment A3: the discriminator and its losses."""
