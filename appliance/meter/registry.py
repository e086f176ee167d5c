"""Information Elements that python-ipfix's registry does not have: IANA's later ones, and CERT's (YAF).

Names, numbers and types are IANA's registry "IPFIX Information Elements" and CERT's "ipfix-elements"; each line is an
IESpec, `name(number)<type>` or `name(enterprise/number)<type>`. The order of the numbers is kept.
"""

from __future__ import annotations

REVERSE_ENTERPRISE = 29305  # RFC 5103, 6.1: the reverse counterpart of an IANA element
CERT_ENTERPRISE = 6871
CERT_REVERSE_BIT = 0x4000  # CERT's own convention for its reversible elements

IANA_SPECS = """
basicList(291)<basicList>
subTemplateList(292)<subTemplateList>
subTemplateMultiList(293)<subTemplateMultiList>
mibObjectValueInteger(434)<signed32>
mibObjectValueOctetString(435)<octetArray>
mibObjectValueOID(436)<octetArray>
mibObjectValueBits(437)<octetArray>
mibObjectValueIPAddress(438)<ipv4Address>
mibObjectValueCounter(439)<unsigned64>
mibObjectValueGauge(440)<unsigned32>
mibObjectValueTimeTicks(441)<unsigned32>
mibObjectValueUnsigned(442)<unsigned32>
mibObjectValueTable(443)<subTemplateList>
mibObjectValueRow(444)<subTemplateList>
mibObjectIdentifier(445)<octetArray>
mibSubIdentifier(446)<unsigned32>
mibIndexIndicator(447)<unsigned64>
mibCaptureTimeSemantics(448)<unsigned8>
mibContextEngineID(449)<octetArray>
mibContextName(450)<string>
mibObjectName(451)<string>
mibObjectDescription(452)<string>
mibObjectSyntax(453)<string>
mibModuleName(454)<string>
mobileIMSI(455)<string>
mobileMSISDN(456)<string>
httpStatusCode(457)<unsigned16>
sourceTransportPortsLimit(458)<unsigned16>
httpRequestMethod(459)<string>
httpRequestHost(460)<string>
httpRequestTarget(461)<string>
httpMessageVersion(462)<string>
natInstanceID(463)<unsigned32>
internalAddressRealm(464)<octetArray>
externalAddressRealm(465)<octetArray>
natQuotaExceededEvent(466)<unsigned32>
natThresholdEvent(467)<unsigned32>
httpUserAgent(468)<string>
httpContentType(469)<string>
httpReasonPhrase(470)<string>
maxSessionEntries(471)<unsigned32>
maxBIBEntries(472)<unsigned32>
maxEntriesPerUser(473)<unsigned32>
maxSubscribers(474)<unsigned32>
maxFragmentsPendingReassembly(475)<unsigned32>
addressPoolHighThreshold(476)<unsigned32>
addressPoolLowThreshold(477)<unsigned32>
addressPortMappingHighThreshold(478)<unsigned32>
addressPortMappingLowThreshold(479)<unsigned32>
addressPortMappingPerUserHighThreshold(480)<unsigned32>
globalAddressMappingHighThreshold(481)<unsigned32>
vpnIdentifier(482)<octetArray>
bgpCommunity(483)<unsigned32>
bgpSourceCommunityList(484)<basicList>
bgpDestinationCommunityList(485)<basicList>
bgpExtendedCommunity(486)<octetArray>
bgpSourceExtendedCommunityList(487)<basicList>
bgpDestinationExtendedCommunityList(488)<basicList>
bgpLargeCommunity(489)<octetArray>
bgpSourceLargeCommunityList(490)<basicList>
bgpDestinationLargeCommunityList(491)<basicList>
srhFlagsIPv6(492)<unsigned8>
srhTagIPv6(493)<unsigned16>
srhSegmentIPv6(494)<ipv6Address>
srhActiveSegmentIPv6(495)<ipv6Address>
srhSegmentIPv6BasicList(496)<basicList>
srhSegmentIPv6ListSection(497)<octetArray>
srhSegmentsIPv6Left(498)<unsigned8>
srhIPv6Section(499)<octetArray>
srhIPv6ActiveSegmentType(500)<unsigned8>
srhSegmentIPv6LocatorLength(501)<unsigned8>
srhSegmentIPv6EndpointBehavior(502)<unsigned16>
transportChecksum(503)<unsigned16>
icmpHeaderPacketSection(504)<octetArray>
gtpuFlags(505)<unsigned8>
gtpuMsgType(506)<unsigned8>
gtpuTEid(507)<unsigned32>
gtpuSequenceNum(508)<unsigned16>
gtpuQFI(509)<unsigned8>
gtpuPduType(510)<unsigned8>
bgpSourceAsPathList(511)<basicList>
bgpDestinationAsPathList(512)<basicList>
ipv6ExtensionHeaderType(513)<unsigned8>
ipv6ExtensionHeaderCount(514)<unsigned8>
ipv6ExtensionHeadersFull(515)<octetArray>
ipv6ExtensionHeaderTypeCountList(516)<subTemplateList>
ipv6ExtensionHeadersLimit(517)<boolean>
ipv6ExtensionHeadersChainLength(518)<unsigned32>
ipv6ExtensionHeaderChainLengthList(519)<subTemplateList>
tcpOptionsFull(520)<octetArray>
tcpSharedOptionExID16(521)<unsigned16>
tcpSharedOptionExID32(522)<unsigned32>
tcpSharedOptionExID16List(523)<basicList>
tcpSharedOptionExID32List(524)<basicList>
udpSafeOptions(525)<octetArray>
udpUnsafeOptions(526)<unsigned64>
udpExID(527)<unsigned16>
udpSafeExIDList(528)<basicList>
udpUnsafeExIDList(529)<basicList>
""".split()

CERT_SPECS = """
reverseFlowDeltaMilliseconds(6871/21)<unsigned32>
silkFlowType(6871/30)<unsigned8>
silkFlowSensor(6871/31)<unsigned16>
silkTCPState(6871/32)<unsigned8>
silkAppLabel(6871/33)<unsigned16>
expiredFragmentCount(6871/100)<unsigned32>
assembledFragmentCount(6871/101)<unsigned32>
meanFlowRate(6871/102)<unsigned32>
meanPacketRate(6871/103)<unsigned32>
flowTableFlushEventCount(6871/104)<unsigned32>
flowTablePeakCount(6871/105)<unsigned32>
yafFlowKeyHash(6871/106)<unsigned32>
""".split()

CERT_REVERSIBLE_SPECS = """
payload(6871/18)<octetArray>
payloadEntropy(6871/35)<unsigned8>
osName(6871/36)<string>
osVersion(6871/37)<string>
firstPacketBanner(6871/38)<octetArray>
secondPacketBanner(6871/39)<octetArray>
flowAttributes(6871/40)<unsigned16>
osFingerPrint(6871/107)<string>
smallPacketCount(6871/500)<unsigned32>
nonEmptyPacketCount(6871/501)<unsigned32>
dataByteCount(6871/502)<unsigned64>
averageInterarrivalTime(6871/503)<unsigned64>
standardDeviationInterarrivalTime(6871/504)<unsigned64>
firstNonEmptyPacketSize(6871/505)<unsigned16>
maxPacketSize(6871/506)<unsigned16>
firstEightNonEmptyPacketDirections(6871/507)<unsigned8>
standardDeviationPayloadLength(6871/508)<unsigned16>
tcpUrgentCount(6871/509)<unsigned32>
largePacketCount(6871/510)<unsigned32>
""".split()
