"""The ledger's rows about people: tokens, sessions, the audit, and previews of what they are about
to do.
"""
