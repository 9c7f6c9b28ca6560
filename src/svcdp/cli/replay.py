"""``svcdp replay``"""
