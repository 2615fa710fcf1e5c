# Nuclei, Mask R-CNN, DS-Net without the norms of its outputs, with DS-FPN.
_base_ = '_base_/nuclei.py'

custom_imports = dict(imports=['dsnet_mm.cli.evidence.norms'])
model = dict(backbone=dict(type='DSNetWithoutOutputNorm'))
