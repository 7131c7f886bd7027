"""Operations on backups, which record in the ledger what they do. Tasks and commands use them."""
