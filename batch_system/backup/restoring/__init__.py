"""Plans a restore, carries it out in one transaction, or tries it out in a scratch place."""
