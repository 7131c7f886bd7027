"""Plans a restore, carries it out in one piece, or tries it out where nobody sees it."""
