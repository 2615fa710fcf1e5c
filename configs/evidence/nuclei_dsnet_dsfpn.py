# Nuclei, Mask R-CNN, DS-Net with DS-FPN.
_base_ = '_base_/nuclei.py'
