"""The parser of `nvidia-smi -q -x`, on a recorded answer and on what other drivers and cards say differently."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmhost.nvidia_smi import Smi, SmiGpu, parse
from tests.recorded.machines import GB10, H100, H200_XML, RTX_3090, nvidia_smi


def recorded(old: str, new: str) -> SmiGpu:
    """The H200's answer with a text replaced."""
    assert old in H200_XML
    (gpu,) = parse(H200_XML.replace(old, new)).gpus
    return gpu


def older(body: str) -> SmiGpu:
    """A GPU of which an older driver says only this."""
    (gpu,) = parse(
        f'<?xml version="1.0" ?>\n<nvidia_smi_log><gpu id="00000000:3B:00.0">{body}</gpu></nvidia_smi_log>'
    ).gpus
    return gpu


def test_the_recorded_h200() -> None:
    assert parse(H200_XML) == Smi(
        driver_version="580.159.04",
        cuda_version="13.0",
        gpus=(
            SmiGpu(
                address="0000:00:06.0",
                name="NVIDIA H200",
                uuid="GPU-00000000-0000-0000-0000-000000000000",
                architecture="Hopper",
                memory_bytes=143771 << 20,
                compute_capability="",
                ecc=True,
                mig=False,
                link_width=16,
                link_width_max=16,
                power_limit_watts=700.0,
                event_reasons=frozenset(),
                recovery_action="None",
                persistence=True,
                power_draw_watts=76.52,
                temperature_celsius=35.0,
                compute_mode="Default",
                gsp_firmware="580.159.04",
                ecc_errors_uncorrected=0,
                remapped_rows_pending=False,
                remapped_rows_failed=False,
                fabric_state="",
                fabric_status="",
            ),
        ),
    )


def test_the_fixture_names_no_machine() -> None:
    assert "GPU-00000000-0000-0000-0000-000000000000" in H200_XML
    assert "<serial>N/A</serial>" in H200_XML
    assert "<pdi>0x0000000000000000</pdi>" in H200_XML


def test_several_gpus_keep_their_order() -> None:
    second = replace(H100, address="0000:c1:00.0")
    smi = parse(nvidia_smi("595.91.07", "13.2", H100, second))
    assert (smi.driver_version, smi.cuda_version) == ("595.91.07", "13.2")
    assert [gpu.address for gpu in smi.gpus] == ["0000:41:00.0", "0000:c1:00.0"]
    assert len({gpu.uuid for gpu in smi.gpus}) == 2


def test_a_card_without_ecc_and_mig() -> None:
    (gpu,) = parse(nvidia_smi("550.144.03", "12.4", RTX_3090)).gpus
    assert (gpu.ecc, gpu.mig, gpu.memory_bytes) == (None, None, 24576 << 20)


def test_memory_that_is_shared_with_the_processor() -> None:
    (gpu,) = parse(nvidia_smi("580.159.04", "13.0", GB10)).gpus
    assert (gpu.address, gpu.memory_bytes) == ("000f:01:00.0", None)


@pytest.mark.parametrize(
    ("identity", "address"),
    [
        ("00000000:00:06.0", "0000:00:06.0"),
        ("0000000F:01:00.0", "000f:01:00.0"),
        ("00010000:E1:00.0", "10000:e1:00.0"),
        ("0000:3B:1F.7", "0000:3b:1f.7"),
    ],
)
def test_addresses_are_written_as_sysfs_writes_them(identity: str, address: str) -> None:
    assert recorded('<gpu id="00000000:00:06.0">', f'<gpu id="{identity}">').address == address


def test_active_reasons_for_slower_clocks() -> None:
    gpu = recorded(
        "<clocks_event_reason_hw_thermal_slowdown>Not Active", "<clocks_event_reason_hw_thermal_slowdown>Active"
    )
    assert gpu.event_reasons == frozenset({"hw_thermal_slowdown"})  # the recorded GPU idles, which slows nothing down


def test_reasons_had_another_name_before_driver_535() -> None:
    gpu = older(
        "<clocks_throttle_reasons><clocks_throttle_reason_gpu_idle>Active</clocks_throttle_reason_gpu_idle>"
        "<clocks_throttle_reason_sw_power_cap>Active</clocks_throttle_reason_sw_power_cap>"
        "<clocks_throttle_reason_hw_slowdown>Not Active</clocks_throttle_reason_hw_slowdown></clocks_throttle_reasons>"
    )
    assert gpu.event_reasons == frozenset({"sw_power_cap"})


@pytest.mark.parametrize(
    ("readings", "limit", "draw"),
    [
        (
            "<gpu_power_readings><power_draw>30.10 W</power_draw><current_power_limit>70.00 W</current_power_limit>"
            "</gpu_power_readings>",
            70.0,
            30.1,
        ),
        (
            "<power_readings><power_draw>30.10 W</power_draw><power_limit>250.00 W</power_limit>"
            "<enforced_power_limit>200.00 W</enforced_power_limit></power_readings>",
            200.0,
            30.1,
        ),
        (
            "<gpu_power_readings><average_power_draw>9.50 W</average_power_draw>"
            "<instant_power_draw>N/A</instant_power_draw><current_power_limit>N/A</current_power_limit>"
            "</gpu_power_readings>",
            None,
            9.5,
        ),
    ],
)
def test_power_of_several_drivers(readings: str, limit: float | None, draw: float) -> None:
    gpu = older(readings)
    assert (gpu.power_limit_watts, gpu.power_draw_watts) == (limit, draw)


@pytest.mark.parametrize(
    ("volatile", "errors"),
    [
        ("<sram_uncorrectable>1</sram_uncorrectable><dram_uncorrectable>2</dram_uncorrectable>", 3),
        ("<sram_uncorrectable>N/A</sram_uncorrectable><dram_uncorrectable>2</dram_uncorrectable>", 2),
        ("<sram_uncorrectable>N/A</sram_uncorrectable><dram_uncorrectable>N/A</dram_uncorrectable>", None),
        ("<single_bit><total>7</total></single_bit><double_bit><total>4</total></double_bit>", 4),
        ("<single_bit><total>7</total></single_bit><double_bit><total>N/A</total></double_bit>", None),
    ],
)
def test_uncorrected_errors_since_the_driver_was_loaded(volatile: str, errors: int | None) -> None:
    aggregate = "<aggregate><dram_uncorrectable>99</dram_uncorrectable></aggregate>"
    gpu = older(f"<ecc_errors><volatile>{volatile}</volatile>{aggregate}</ecc_errors>")
    assert gpu.ecc_errors_uncorrected == errors


@pytest.mark.parametrize("kind", ["sram_uncorrectable_parity", "sram_uncorrectable_secded", "dram_uncorrectable"])
def test_each_kind_of_uncorrected_error_counts(kind: str) -> None:
    before, _, after = H200_XML.partition(f"<{kind}>0")
    (gpu,) = parse(f"{before}<{kind}>5{after}").gpus
    assert gpu.ecc_errors_uncorrected == 5


def test_rows_that_wait_to_be_replaced_or_cannot_be() -> None:
    assert recorded("<remapped_row_pending>No", "<remapped_row_pending>Yes").remapped_rows_pending
    assert recorded("<remapped_row_failure>No", "<remapped_row_failure>Yes").remapped_rows_failed


@pytest.mark.parametrize("tag", ["pending_retirement", "pending_blacklist"])
def test_older_cards_retire_pages(tag: str) -> None:
    gpu = older(f"<remapped_rows>N/A</remapped_rows><retired_pages><{tag}>Yes</{tag}></retired_pages>")
    assert (gpu.remapped_rows_pending, gpu.remapped_rows_failed) == (True, None)


def test_a_fabric_that_is_ready() -> None:
    fabric = "<fabric>\n\t\t\t<state>N/A</state>\n\t\t\t<status>N/A</status>"
    gpu = recorded(fabric, "<fabric><state>Completed</state><status>Success</status>")
    assert (gpu.fabric_state, gpu.fabric_status) == ("Completed", "Success")


def test_a_gpu_that_wants_a_reset() -> None:
    assert recorded("<gpu_recovery_action>None", "<gpu_recovery_action>Reset").recovery_action == "Reset"


def test_what_an_older_driver_does_not_say_is_not_known() -> None:
    gpu = older("<product_name>Tesla T4</product_name><persistence_mode>Disabled</persistence_mode>")
    assert (gpu.name, gpu.persistence) == ("Tesla T4", False)
    numbers = (gpu.memory_bytes, gpu.link_width, gpu.power_limit_watts, gpu.temperature_celsius)
    assert numbers == (None, None, None, None)
    assert (gpu.recovery_action, gpu.gsp_firmware, gpu.fabric_state, gpu.compute_mode) == ("", "", "", "")
    assert (gpu.ecc, gpu.mig, gpu.ecc_errors_uncorrected, gpu.remapped_rows_pending) == (None, None, None, None)


def test_a_gpu_that_needs_a_reset_says_no_numbers() -> None:
    assert recorded("143771 MiB", "[GPU requires reset]").memory_bytes is None


def test_a_link_that_lost_lanes() -> None:
    gpu = recorded("<current_link_width>16x", "<current_link_width>8x")
    assert (gpu.link_width, gpu.link_width_max) == (8, 16)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Failed to initialize NVML: Driver/library version mismatch",
        "sh: 1: nvidia-smi: not found",
        "No devices were found",
    ],
)
def test_what_is_no_xml_is_no_answer(text: str) -> None:
    assert parse(text) == Smi("", "", ())


def test_warnings_around_the_answer_are_no_matter() -> None:
    warning = "WARNING: infoROM is corrupted at gpu 0000:00:06.0\n"
    assert parse(warning + H200_XML + warning) == parse(H200_XML)


def test_an_answer_without_gpus() -> None:
    text = '<?xml version="1.0" ?>\n<nvidia_smi_log><driver_version>580.159.04</driver_version></nvidia_smi_log>'
    assert parse(text) == Smi("580.159.04", "", ())


@pytest.mark.parametrize(
    "text",
    [
        H200_XML[: len(H200_XML) // 2],
        '<?xml version="1.0" ?>\n',
        H200_XML.replace("<uuid>", "<uid>"),
        H200_XML.replace('id="00000000:00:06.0"', 'id="00:06"'),
        H200_XML.replace('id="00000000:00:06.0"', ""),
        H200_XML.replace('id="00000000:00:06.0"', 'id="zone:00:06.0"'),
    ],
)
def test_what_is_cut_short_or_garbled_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nvidia-smi"):
        parse(text)
