"""pcap files to records.

Read are versions 2.0 to 2.4 in both byte orders, microseconds (0xa1b2c3d4), nanoseconds (0xa1b23c4d) and Kuznetzov's
modification (0xa1b2cd34). Before version 2.3 the original length comes before the captured one. A captured length
above the original length or above the file's snaplen is taken as it is; above 262144 it is damage.
"""

from appliance.formats.decoder import Decoder

class PcapDecoder(Decoder):
    zeros_are_damage: bool
    """A packet of no octets, sent as none, at time 0, is none: zeros are what a crash leaves of a file."""
