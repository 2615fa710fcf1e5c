_base_ = '_base_/nuclei.py'
