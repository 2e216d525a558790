"""austeer"""
