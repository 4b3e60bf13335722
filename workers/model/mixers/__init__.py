"""How the tokens of a layer see each other. One file per mixer, registered by name."""
